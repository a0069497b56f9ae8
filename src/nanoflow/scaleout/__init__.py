"""Several replicas of the engine behind one: routing, failover and restarts, on Ray or in tests without it."""
