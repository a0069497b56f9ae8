"""Between text and token ids: tokenizers, incremental detokenisation, chat templates. No torch, no server."""
