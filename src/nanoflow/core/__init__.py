"""Plain data that every other folder speaks in: config, specs, requests, sampling parameters, batch plans, errors. No torch."""
