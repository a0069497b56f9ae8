"""One model on several devices: process groups as values, which rank holds what, collectives issued on a lane."""
