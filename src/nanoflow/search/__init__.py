"""From a profile to pipelines: stage 1 orders nano-operations, stage 2 shares the device among them. No torch."""
