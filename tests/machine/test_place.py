"""By which address a process is reached from other machines."""

from __future__ import annotations

import socket

import pytest
from attrs import evolve

from nemo_rl_core.errors import ResourceError
from nemo_rl_core.machine import place
from nemo_rl_core.machine.place import ADDRESS_VARIABLE, find_place, gloo_interface


def test_the_address_that_the_launcher_knows_goes_before_what_is_guessed(monkeypatch):
    monkeypatch.delenv(ADDRESS_VARIABLE, raising=False)
    assert find_place().address.count(".") == 3
    monkeypatch.setenv(ADDRESS_VARIABLE, "10.1.2.3")
    assert find_place().address == find_place().address_between_machines() == "10.1.2.3"


def test_an_address_of_this_machine_alone_is_not_told_to_another():
    with pytest.raises(ResourceError, match=r"cannot reach node-7: .* 127.0.1.1. Set NEMO_RL_ADDRESS"):
        evolve(find_place(), host="node-7", address="127.0.1.1").address_between_machines()


def test_gloo_is_told_the_interface_where_the_host_name_is_a_loopback_address(monkeypatch):
    addresses = {"lo": "127.0.0.1", "eth0": "192.0.2.7", "ib0": "10.1.2.3"}
    monkeypatch.setattr(place, "_address_of", addresses.get)
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(addresses, 1)))
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "127.0.1.1")
    assert gloo_interface("10.1.2.3") == "ib0"
    assert gloo_interface("10.9.9.9") is None and gloo_interface("127.0.0.1") is None and gloo_interface("") is None
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "192.0.2.7")
    assert gloo_interface("10.1.2.3") is None, "gloo's own choice is one that others reach"


@pytest.mark.skipif(not hasattr(socket, "SO_BINDTODEVICE"), reason="reads the addresses as Linux tells them")
def test_the_address_of_an_interface():
    assert place._address_of("lo") == "127.0.0.1" and place._address_of("none-such") is None
