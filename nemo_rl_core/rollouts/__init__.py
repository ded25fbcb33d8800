"""Episodes: engine, buffer, records, reward and environment pools."""
