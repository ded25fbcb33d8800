"""The data module: order, epochs, resume, sources in Python, and what it says of bad data."""

from __future__ import annotations

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl_core.data.module import DataModule
from nemo_rl_core.errors import DataError, PluginBroken, PluginNotFound
from nemo_rl_core.schema import DataConfig, DatasetConfig

torch.set_num_threads(1)


def rows(num, **extra):
    return [{"prompt": f"p{i}", **extra} for i in range(num)]


def stream(num):
    """A function that starts a stream anew, as a user's generator function does."""

    def read():
        yield from rows(num)

    return read


def module(source, **options):
    shuffle = options.pop("shuffle", True)
    return DataModule(DataConfig(shuffle=shuffle), **{"seed": 3, "train_rows": source, **options})


def taken(data, num_batches, size):
    return [(x.index, x.epoch, x.row_index, x.task["prompt"]) for _ in range(num_batches) for x in data.next(size)]


def drain(data, size):
    out = []
    while True:
        batch = data.next(size)
        if batch is None:
            return out
        out.append([x.row_index for x in batch])


# -- order ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [rows(10), stream(10)], ids=["table", "stream"])
def test_each_epoch_has_every_row_once_in_its_own_order(source):
    seen = taken(module(source, max_epochs=3), 10, 3)
    assert [s[0] for s in seen] == list(range(30))
    epochs = [[s[2] for s in seen if s[1] == e] for e in range(3)]
    assert [sorted(e) for e in epochs] == [list(range(10))] * 3
    assert len({tuple(e) for e in epochs}) == 3
    assert all(s[3] == f"p{s[2]}" for s in seen)


@pytest.mark.parametrize("source", [rows(20), stream(20)], ids=["table", "stream"])
def test_order_depends_on_the_seed_and_on_nothing_global(source):
    torch.manual_seed(0)
    random.seed(0)
    first = taken(module(source), 4, 5)
    torch.manual_seed(1)
    random.seed(1)
    state = torch.get_rng_state()
    assert taken(module(source), 4, 5) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert taken(module(source, seed=4), 4, 5) != first


@pytest.mark.parametrize("source", [rows(5), stream(5)], ids=["table", "stream"])
def test_without_shuffle_the_order_is_the_source_s(source):
    assert [s[2] for s in taken(module(source, shuffle=False), 2, 5)] == [0, 1, 2, 3, 4] * 2


def test_rows_that_declare_their_order_are_not_shuffled():
    class Curriculum(list):
        ordered = True

    assert [s[2] for s in taken(module(Curriculum(rows(30))), 1, 30)] == list(range(30))


def test_a_long_stream_is_shuffled_within_its_buffer():
    data = module(stream(500), stream_buffer=50)
    order = [s[2] for s in taken(data, 1, 500)]
    assert sorted(order) == list(range(500)) and order != list(range(500))
    assert all(row <= place + 50 for place, row in enumerate(order))  # it never looked further ahead


# -- ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [rows(10), stream(10)], ids=["table", "stream"])
def test_batches_run_across_epochs_and_only_the_last_rest_is_dropped(source):
    batches = drain(module(source, max_epochs=2, shuffle=False), 3)
    assert [i for b in batches for i in b] == [*range(10), *range(8)]
    data = module(source, max_epochs=2)
    drain(data, 3)
    assert data.next(3) is None


def test_sizes():
    data = module(rows(10), max_epochs=3)
    assert (len(data), data.total_steps(4), data.total_items) == (10, 7, 30)
    endless = module(rows(10))
    assert (endless.total_steps(4), endless.total_items) == (None, None)
    assert len(endless.next(25)) == 25
    unknown = module(stream(10), max_epochs=3)
    assert unknown.total_steps(4) is None
    with pytest.raises(TypeError, match="stream"):
        len(unknown)


@pytest.mark.parametrize("source", [rows(3), stream(3)], ids=["table", "stream"])
def test_fewer_rows_than_one_batch(source):
    with pytest.raises(DataError, match=r"takes 4 rows.* has 3"):
        module(source, max_epochs=1).next(4)


# -- resume ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("kind", ["table", "stream"])
@given(size=st.integers(1, 4), before=st.integers(0, 9), num_rows=st.integers(4, 7))
@settings(max_examples=25, deadline=None)
def test_a_resumed_run_neither_repeats_nor_skips(kind, shuffle, size, before, num_rows):
    def fresh():
        source = rows(num_rows) if kind == "table" else stream(num_rows)
        return module(source, shuffle=shuffle, stream_buffer=3)

    whole = taken(fresh(), before + 4, size)
    first = fresh()
    head = taken(first, before, size)
    state = json.loads(json.dumps(first.state_dict()))  # a checkpoint may be JSON
    second = fresh()
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert head + taken(second, 4, size) == whole


@pytest.mark.parametrize("source", [rows(10), stream(10)], ids=["table", "stream"])
def test_a_finished_run_continues_when_epochs_are_added(source):
    first = module(source, max_epochs=1)
    done = [s for b in drain(first, 4) for s in b]
    second = module(source, max_epochs=2)
    second.load_state_dict(first.state_dict())
    more = [s for b in drain(second, 4) for s in b]
    assert done + more == [s[2] for s in taken(module(source, max_epochs=2), 5, 4)]


def test_taking_the_state_changes_nothing():
    watched, alone = module(rows(9)), module(rows(9))
    seen = []
    for _ in range(5):
        watched.state_dict()
        seen += taken(watched, 1, 4)
    assert seen == taken(alone, 5, 4)


def test_a_stream_with_a_state_of_its_own_is_not_read_again():
    class Counter:
        """Counts how many rows were read from it."""

        reads = 0

        def __init__(self):
            self.at = 0

        def __iter__(self):
            while self.at < 100:
                self.at += 1
                Counter.reads += 1
                yield {"prompt": f"p{self.at - 1}"}
            self.at = 0

        def state_dict(self):
            return {"at": self.at}

        def load_state_dict(self, state):
            self.at = state["at"]

    first = module(Counter(), shuffle=False)
    taken(first, 10, 6)
    state = first.state_dict()
    Counter.reads = 0
    second = module(Counter(), shuffle=False)
    second.load_state_dict(state)
    assert taken(second, 1, 2) == [(60, 0, 60, "p60"), (61, 0, 61, "p61")]
    assert Counter.reads == 2


@pytest.mark.parametrize(
    ("source", "seed", "shuffle", "what"),
    [
        (rows(9), 3, True, "num_rows was 10 and is 9"),
        (rows(10, level=2), 3, True, "content was"),
        (rows(10), 4, True, "seed was 3 and is 4"),
        (rows(10), 3, False, "shuffle was True and is False"),
    ],
)
def test_resuming_on_other_data_is_refused(source, seed, shuffle, what, caplog):
    state = module(rows(10)).state_dict()
    other = module(source, seed=seed, shuffle=shuffle)
    with pytest.raises(DataError, match=what):
        other.load_state_dict(state)
    other.load_state_dict(state, allow_changed_data=True)
    assert what in caplog.text
    assert len(other.next(4)) == 4


def test_a_shorter_stream_cannot_be_resumed():
    first = module(stream(10))
    first.next(8)
    second = module(stream(5))
    second.load_state_dict(first.state_dict())
    with pytest.raises(DataError, match="has 5 rows, but the saved run had read 8"):
        second.next(1)


# -- sources in Python ----------------------------------------------------------------------------------------


def test_a_generator_object_is_read_once():
    once = module(stream(5)(), max_epochs=1, shuffle=False)
    assert drain(once, 2) == [[0, 1], [2, 3]]
    with pytest.raises(DataError, match="Pass the function"):
        module(stream(5)(), max_epochs=2).next(6)


def test_functions_get_options_and_may_return_a_list():
    def make(num):
        return rows(num)

    config = DataConfig(train=DatasetConfig(source=make, options={"num": 4}))
    assert len(DataModule(config, seed=0)) == 4


def test_a_component_class_is_built_from_its_config():
    from attrs import frozen

    @frozen(kw_only=True)
    class Options:
        size: int

    class Source:
        config_class = Options

        def __init__(self, config):
            self.config = config

        def load(self):
            return rows(self.config.size)

    good = DataConfig(train=DatasetConfig(source=Source, options={"size": 4}))
    assert len(DataModule(good, seed=0)) == 4
    bad = DataConfig(train=DatasetConfig(source=Source, options={"sise": 4}))
    with pytest.raises(ValueError, match=r"(?s)options\.sise.*did you mean `size`"):
        len(DataModule(bad, seed=0))


def test_limit_takes_the_first_rows():
    for source in (rows(10), stream(10)):
        config = DataConfig(train=DatasetConfig(source=source, limit=4))
        assert sorted(s[2] for s in taken(DataModule(config, seed=0), 2, 4)) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_hugging_face_dataset_and_a_data_frame():
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(rows(6))
    assert len(module(table).next(4)) == 4
    assert len(module(table.to_iterable_dataset(), shuffle=False).next(8)) == 8
    assert len(module(table.to_pandas()).next(4)) == 4
    with pytest.raises(DataError, match=r"dataset\['train'\]"):
        module(datasets.DatasetDict(train=table)).next(1)


def test_task_ids_are_the_rows_own_if_unique():
    ids = [{"prompt": "p", "id": f"q{i}"} for i in range(4)]
    assert {x.task_id for x in module(ids).next(4)} == {"q0", "q1", "q2", "q3"}
    same = [{"prompt": "p", "id": "q"} for _ in range(4)]
    assert {x.task_id for x in module(same).next(4)} == {"0", "1", "2", "3"}


def test_a_limit_of_the_training_rows_is_none_of_the_validation_rows():
    limited = DataConfig(train=DatasetConfig(limit=2))
    data = DataModule(limited, seed=0, train_rows=rows(6), validation_rows=rows(5), max_epochs=1)
    assert (len(data), len(data.validation())) == (2, 5)


def test_validation_rows_in_their_order():
    data = module(rows(3), validation_rows=rows(6))
    assert [x.task["prompt"] for x in data.validation(4)] == ["p0", "p1", "p2", "p3"]
    assert len(data.validation()) == 6
    assert [x.row_index for x in module(rows(3), validation_rows=stream(6)).validation(2)] == [0, 1]
    assert module(rows(3)).validation() == []
    with pytest.raises(DataError, match="empty"):
        module(rows(3), validation_rows=[]).validation()


def test_supervised_rows_keep_their_answer():
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (item,) = module([{"messages": chat}], feed="examples").next(1)
    assert item.task["messages"] == chat
    (item,) = module([{"messages": chat}]).next(1)
    assert item.task == {"prompt": chat[:1], "answer": "a"}


# -- bad data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "No dataset is given"),
        ([], "is empty"),
        (lambda: iter(()), "is empty"),
        (7, "gave a int"),
        ([{"text": "x"}], "'text'"),
        (["just text"], "Row 0 of .* is a str"),
    ],
)
def test_unusable_sources(source, message):
    with pytest.raises(DataError, match=message):
        module(source).next(1)


def test_a_row_that_cannot_be_read_is_named():
    class Broken(list):
        def __getitem__(self, index):
            if index == 2:
                raise OSError("disk gone")
            return super().__getitem__(index)

    def breaks():
        yield from rows(2)
        raise OSError("disk gone")

    for source in (Broken(rows(3)), breaks):
        with pytest.raises(DataError, match=r"Row 2 of .*disk gone"):
            module(source).next(3)


# -- names and files ------------------------------------------------------------------------------------------


class FakeRegistry:
    """A registry of what the test puts in."""

    def __init__(self, **components):
        self.components = components

    def names(self, kind):
        assert kind == "datasets"
        return sorted(self.components)

    def resolve(self, kind, name):
        if name not in self.components:
            raise PluginNotFound(f"No dataset named {name!r}.")
        if self.components[name] is None:
            raise PluginBroken(f"{name} does not import.")
        return self.components[name]


class LineSource:
    """Reads `.lines` files."""

    config_class = dict

    def __init__(self, config):
        self.path = config["path"]

    @classmethod
    def accepts(cls, source):
        return source.endswith(".lines")

    def load(self):
        with open(self.path) as file:
            return [{"prompt": line.strip()} for line in file]


def named(source, registry, **options):
    return DataModule(DataConfig(train=DatasetConfig(source=source, options=options)), seed=0, registry=registry)


def test_a_name_or_a_file_finds_its_component(tmp_path):
    path = tmp_path / "x.lines"
    path.write_text("a\nb\n")
    registry = FakeRegistry(lines=LineSource, squares=lambda n: [{"prompt": str(i * i)} for i in range(n)], bad=None)
    assert len(named("lines", registry, path=str(path))) == 2
    assert len(named(str(path), registry)) == 2  # the broken plugin is passed over
    assert len(named("squares", registry, n=5)) == 5


def test_what_is_not_found_is_told_with_what_is_installed(tmp_path):
    registry = FakeRegistry(lines=LineSource, bad=None)
    other = tmp_path / "x.other"
    other.write_text("")
    for source, message in [
        (str(other), "No installed dataset component reads .*Installed dataset components: bad, lines"),
        ("./missing.other", "does not exist"),
        ("some/where", "neither a dataset component nor an existing file.*bad, lines"),
        ("line", "Did you mean 'lines'"),
    ]:
        with pytest.raises(DataError, match=message):
            len(named(source, registry))
    with pytest.raises(PluginBroken):
        len(named("bad", registry))
    with pytest.raises(PluginNotFound):  # a component's own sub-name, not a hub's
        len(named("lines/nope", registry))
