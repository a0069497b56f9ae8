"""Models: what they are (configs of three formats), where their weights lie, and the one decoder that runs them."""
