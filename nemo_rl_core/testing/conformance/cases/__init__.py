"""Small cases that the kits of algorithms, losses and backends work on."""
