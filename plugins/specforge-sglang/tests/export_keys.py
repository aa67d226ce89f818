"""Runs where SGLang is installed: load exports into SGLang's own classes, and tell what was used.

python export_keys.py PORT EXPORT_DIR...  SGLang skips keys that it does not know without a word, so
tensors are loaded one by one, and a parameter that stays NaN was never written.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
from sglang.srt.layers.dp_attention import initialize_dp_attention
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.server_args import ServerArgs

try:
    from sglang.srt.runtime_context import SpawnRanks, publish
except ImportError:  # 0.5.14
    from sglang.srt.server_args import set_global_server_args_for_scheduler

    publish = None


def prepare(path: str, port: str) -> None:
    """Set up what SGLang's layers expect of a process: one rank, on a CPU."""
    args = ServerArgs(model_path=path, device="cpu", skip_tokenizer_init=True)
    if publish is None:
        set_global_server_args_for_scheduler(args)
    else:
        publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0))
    init_distributed_environment(
        backend="gloo",
        world_size=1,
        rank=0,
        local_rank=0,
        distributed_init_method=f"tcp://127.0.0.1:{port}",
    )
    initialize_model_parallel()
    config = ModelConfig.from_server_args(args, model_path=path)
    wanted = len(inspect.signature(initialize_dp_attention).parameters)
    initialize_dp_attention(*(args, config)[:wanted])  # versions differ


def build(path: str, dtype: torch.dtype) -> Any:
    """Return SGLang's class for the config at `path`, with weights of no meaning."""
    args = ServerArgs(model_path=path, device="cpu", skip_tokenizer_init=True)
    config = ModelConfig.from_server_args(args, model_path=path)
    model_class, _ = ModelRegistry.resolve_model_cls(config.hf_config.architectures)
    torch.set_default_dtype(dtype)
    return model_class(config.hf_config)


def main(port: str, *paths: str) -> None:
    prepare(paths[0], port)
    print(json.dumps([used(path) for path in paths]))


def used(path: str) -> dict[str, Any]:
    """Return the class of an export, its keys that were ignored, and parameters that it left."""
    model = build(path, torch.bfloat16)
    parameters = dict(model.named_parameters())
    for value in parameters.values():
        value.data.fill_(float("nan"))
    ignored = []
    for name, tensor in load_file(Path(path) / "model.safetensors").items():
        before = {key: int(value.isnan().sum()) for key, value in parameters.items()}
        hot = getattr(model, "hot_token_id", None)
        model.load_weights([(name, tensor)])
        changed = any(int(parameters[key].isnan().sum()) != count for key, count in before.items())
        if not changed and getattr(model, "hot_token_id", None) is hot:
            ignored.append(name)
    missing = [key for key, value in parameters.items() if value.isnan().any()]
    hot = getattr(model, "hot_token_id", None)
    told = {"class": type(model).__name__, "ignored": ignored, "missing": missing}
    return told | {"draft_tokens": None if hot is None else hot.tolist()}


if __name__ == "__main__":
    main(*sys.argv[1:])
