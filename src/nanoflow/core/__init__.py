"""Plain data that every other folder speaks in: config, specs, requests, batch plans, errors. No torch."""
