"""What other engines call an option, so that whoever has vLLM's or SGLang's names in the fingers is told ours.

Spelling alone would mislead here: the nearest of our names to `max_num_seqs` is `max_n`, which means something else.
"""

from __future__ import annotations

SAME: dict[str, str] = {
    "gpu_memory_utilization": "kv_memory_fraction",
    "mem_fraction_static": "kv_memory_fraction",
    "max_num_seqs": "max_running",
    "max_running_requests": "max_running",
    "max_num_batched_tokens": "dense_batch",
    "chunked_prefill_size": "dense_batch",
    "block_size": "page_tokens",
    "page_size": "page_tokens",
    "context_length": "max_model_len",
    "tp_size": "tensor_parallel_size",
    "enable_expert_parallel": "expert_parallel",
    "data_parallel_size": "replicas",
    "dp_size": "replicas",
    "tokenizer_path": "tokenizer",
    "random_seed": "seed",
}
"""Their name → ours, for the same thing or the nearest to it."""

NEEDLESS: dict[str, str] = {
    "trust_remote_code": "code of a model's folder is never run, so leave it out",
    "enforce_eager": "there is nothing to switch off; leave it out",
    "enable_chunked_prefill": "prompts are always computed in chunks; leave it out",
    "disable_log_requests": "requests are not logged; leave it out",
    "model": "MODEL stands alone, without a flag",
    "model_path": "MODEL stands alone, without a flag",
    "enable_auto_tool_choice": "models may always choose to call tools; leave it out",
    "quantization": "products are computed in dtype, those of a quantised .gguf file too; leave it out",
    "kv_cache_dtype": "the KV cache has the model's dtype; leave it out",
    "swap_space": "kv_dram_bytes, in bytes, keeps KV pages in the host's memory",
    "cpu_offload_gb": "weights stay on the device; kv_dram_bytes, in bytes, keeps KV pages in the host's memory",
}
"""Their name → why there is no such option here, and what to do."""


def normal(name: str) -> str:
    """`--no-max-num-seqs=4` → `max_num_seqs`: the name of an option however it was given."""
    return name.partition("=")[0].lstrip("-").replace("-", "_").lower().removeprefix("no_")
