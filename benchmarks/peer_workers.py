"""The engines that `cpu_peers.py` compares, each behind the same small face, for a process of its own.

Every engine gets the same weights (SmolLM2 by nanoflow's loader, in bfloat16), the same random prompt ids, greedy
decoding, no stop at the end-of-sequence token. A peer that cannot be imported says so by `ImportError`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

MODEL = "smollm2"
MAX_MODEL_LEN = 1024
KV_BYTES = 2 << 30
LLAMA_CONTEXT = 64 * 256


class Worker(Protocol):
    """An engine that is loaded."""

    version: str

    def generate(self, prompts: list[list[int]], n_out: int) -> dict[str, Any]:
        """Generate exactly `n_out` tokens for every prompt; returns the number of tokens made and extra notes."""
        ...


class Nanoflow:
    """This package, through its Python API."""

    def __init__(self, threads: int) -> None:
        from nanoflow import __version__
        from nanoflow.engine.llm import LLM

        self.version = f"nanoflow {__version__}"
        self.llm = LLM(MODEL, dtype="bfloat16", threads=threads, kv_memory_bytes=KV_BYTES, show_progress=False)

    def generate(self, prompts: list[list[int]], n_out: int) -> dict[str, Any]:
        from nanoflow.core.sampling import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=n_out, ignore_eos=True)
        outputs = self.llm.generate([list(ids) for ids in prompts], params, use_tqdm=False)
        return {"n_out": sum(len(output.outputs[0].token_ids) for output in outputs)}

    def notes(self) -> dict[str, Any]:
        """Percent of bound of the last run; asked for after the clock has stopped, since it may measure the machine."""
        report = self.llm.last_report
        return {"percent_of_bound": report.percent_of_bound, "bound": str(report.floors.limit)}


class Transformers:
    """Hugging Face transformers: one padded batch, `generate`, its own scaled-dot-product attention."""

    def __init__(self, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch = torch
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        self.model = hugging_face_model()

    def generate(self, prompts: list[list[int]], n_out: int) -> dict[str, Any]:
        ids = self.torch.tensor(prompts)
        with self.torch.inference_mode():
            tokens = self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=n_out,
                min_new_tokens=n_out,
                do_sample=False,
                pad_token_id=0,
            )
        return {"n_out": (tokens.shape[1] - ids.shape[1]) * tokens.shape[0]}


class Vllm:
    """vLLM's CPU backend, offline."""

    def __init__(self, threads: int) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(KV_BYTES >> 30))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}")
        import vllm

        self.vllm = vllm
        self.version = f"vllm {vllm.__version__}"
        folder = Path(os.environ["PEER_FOLDER"]) / "smollm2-hf"
        if not folder.exists():
            hugging_face_model().save_pretrained(folder)
        self.llm = vllm.LLM(
            str(folder),
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=MAX_MODEL_LEN,
            enable_prefix_caching=False,
        )

    def generate(self, prompts: list[list[int]], n_out: int) -> dict[str, Any]:
        params = self.vllm.SamplingParams(temperature=0.0, max_tokens=n_out, ignore_eos=True, detokenize=False)
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return {"n_out": sum(len(output.outputs[0].token_ids) for output in outputs)}


class LlamaCpp:
    """llama.cpp through its Python bindings: all sequences in one `llama_decode` a step, as its batched bench does.

    The next token is a constant instead of the arg-max, so no time is spent on sampling.
    """

    def __init__(self, threads: int) -> None:
        import llama_cpp

        self.lib = llama_cpp
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        path = Path(os.environ["PEER_FOLDER"]) / "smollm2-bf16.gguf"
        if not path.exists():
            write_bf16_gguf(path)
        params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch, context.n_seq_max = LLAMA_CONTEXT, 2048, 512, 64
        context.n_threads = context.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        self.batch = llama_cpp.llama_batch_init(2048, 0, 1)
        if not self.model or not self.context:
            raise RuntimeError(f"llama.cpp could not load {path}")

    def generate(self, prompts: list[list[int]], n_out: int) -> dict[str, Any]:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        rows = [(token, at, seq, at == len(ids) - 1) for seq, ids in enumerate(prompts) for at, token in enumerate(ids)]
        for start in range(0, len(rows), 2048):
            self._decode(rows[start : start + 2048])
        for step in range(n_out - 1):
            self._decode([(7, len(ids) + step, seq, True) for seq, ids in enumerate(prompts)])
        return {"n_out": n_out * len(prompts)}

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        batch = self.batch
        batch.n_tokens = len(rows)
        for row, (token, position, sequence, wants_logits) in enumerate(rows):
            batch.token[row], batch.pos[row], batch.logits[row] = token, position, wants_logits
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
        code = self.lib.llama_decode(self.context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")


WORKERS = {"nanoflow": Nanoflow, "transformers": Transformers, "vllm": Vllm, "llama.cpp": LlamaCpp}


def hugging_face_model() -> Any:
    """SmolLM2 as `LlamaForCausalLM` in bfloat16, with the weights that nanoflow's loader reads."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from nanoflow.models.registry import resolve_model

    files = resolve_model(MODEL)
    spec = files.spec
    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.d_model,
        intermediate_size=spec.d_ff,
        num_hidden_layers=spec.n_layers,
        num_attention_heads=spec.n_heads,
        num_key_value_heads=spec.n_kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_context_tokens,
        rms_norm_eps=spec.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope.theta},
        tie_word_embeddings=spec.tie_embeddings,
        bos_token_id=spec.bos_id,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    source = files.open_weights()
    state = {name: source.read(name).to(torch.bfloat16) for name in source.names()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model


def write_bf16_gguf(path: Path) -> None:
    """The packaged GGUF with every matrix in BF16 (vectors in F32, as llama.cpp wants them)."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize, quantize

    from nanoflow.models.smollm2 import packaged_gguf

    reader = GGUFReader(packaged_gguf())
    architecture = str(reader.fields["general.architecture"].contents())
    writer = GGUFWriter(path, architecture)
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        sub_type = entry.types[-1] if entry.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, entry.contents(), entry.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            kind = GGMLQuantizationType.BF16
            writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
