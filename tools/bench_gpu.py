"""Measure decoding on a CUDA device, at released sizes with random weights:

    python tools/bench_gpu.py OUT [--tokens 256]

Writes OUT/NAME.json, `portkit bench decode --json` of each size, ours beside Transformers, with the
hardware named in it; the weights are made and taken away again. Runs from a checkout; nothing is
downloaded. Where portkit is not installed PYTHONPATH names an unpacked wheel.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from make_checkpoint import make_checkpoint

VARIANTS = Path(__file__).resolve().parents[1] / "architectures" / "variants"
_TIED = {"tie_word_embeddings": True, "attention_bias": False, "hidden_act": "silu"}
SIZES: dict[str, dict[str, Any]] = {
    "gemma-3-270m": json.loads((VARIANTS / "gemma3-270m.json").read_text()),
    "qwen3-0.6b": {
        **_TIED,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
    },
    "llama-3.2-1b": {
        **_TIED,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure decoding on a CUDA device.")
    parser.add_argument("out", type=Path, help="the folder for the results")
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, config in SIZES.items():
        with TemporaryDirectory(prefix="portkit-") as folder:
            checkpoint = Path(folder) / name
            make_checkpoint(config, checkpoint)
            words = ["bench", "decode", str(checkpoint), "--device", "cuda", "--json"]
            sizes = ["--context", "128,600", "--tokens", str(options.tokens), "--rounds", "3"]
            command = [sys.executable, "-m", "portkit", *words, *sizes, "--against", "transformers"]
            ran = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
            if ran.returncode:
                print(f"{name}: could not be measured, see above", file=sys.stderr)
                continue
            (options.out / f"{name}.json").write_text(ran.stdout)
            found = json.loads(ran.stdout)
            print(f"{name}: {found['hardware']}")
            for row in found["results"]:
                print(f"  {row['engine']}, {row['context']}: {row['tokens_per_s']:.0f} tokens/s")


if __name__ == "__main__":
    main()
