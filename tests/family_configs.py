"""What the config of each family of language models says, at its smallest."""

from __future__ import annotations

from typing import Any

LAYERS = 8
PLAIN: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": 258,
    "pad_token_id": 256,
    "bos_token_id": 256,
}
ENDS = {"vocab_size": 260, "eos_token_id": 258, "bos_token_id": 256}
OWN: dict[str, dict[str, Any]] = {  # families whose configs have names of their own
    "GPT2": {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 512},
    "GPTJ": {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "rotary_dim": 8, "n_positions": 512},
    "Bloom": {"hidden_size": 32, "n_layer": LAYERS, "n_head": 4},
    "OPT": {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": LAYERS, "init_std": 0.2}
    | {"num_attention_heads": 4, "max_position_embeddings": 512, "word_embed_proj_dim": 32},
    "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 512},
    "XGLM": {"d_model": 32, "ffn_dim": 64, "num_layers": LAYERS, "attention_heads": 4}
    | {"max_position_embeddings": 512, "init_std": 0.2, "pad_token_id": 256},
    "Dbrx": {"d_model": 32, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 512}
    | {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}}
    | {"ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},
    "Mamba2": {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_heads": 8, "head_dim": 8}
    | {"state_size": 8, "n_groups": 1},
}
OWN["GPTBigCode"] = OWN["GPT2"]

HEAD = {"head_dim": 16}
SLIDING = {"sliding_window": 8}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPED = ROUTED | {"n_group": 1, "topk_group": 1}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8} | {
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
INDEXED = LATENT | GROUPED | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 512}
LINEAR = (
    HEAD
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    | {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
)
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
GRANITE = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22}
SCALAR = HEAD | SLIDING | {"query_pre_attn_scalar": 16}
PER_LAYER = HEAD | SLIDING | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 260}
GEMMA3N = (
    PER_LAYER
    | {"num_kv_shared_layers": 2, "altup_num_inputs": 2, "laurel_rank": 4}
    | {
        "activation_sparsity_pattern": [0.0] * LAYERS,
        "intermediate_size": [64] * LAYERS,
    }
)
GEMMA4 = PER_LAYER | {"global_head_dim": 16, "num_kv_shared_layers": 2}
LLAMA4 = {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1} | {
    "intermediate_size_mlp": 64,
    "attention_chunk_size": 32,
}
LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


def long_rope(kind: str, longest: int, before: int, **values: Any) -> dict[str, Any]:
    found = rope(kind, original_max_position_embeddings=before, **values)
    return {"max_position_embeddings": longest, "original_max_position_embeddings": before} | found


# name -> the stem of its classes, and what its config says beyond PLAIN
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": ("Afmoe", HEAD | SLIDING | EXPERTS | {"num_dense_layers": 1}),
    "apertus": ("Apertus", {}),
    "arcee": ("Arcee", {}),
    "bamba": ("Bamba", MAMBA | {"attn_layer_indices": [2, 5]}),
    "bitnet": ("BitNet", {}),
    "bloom": ("Bloom", {}),
    "cohere": ("Cohere", {"logit_scale": 0.0625}),
    "cohere2": ("Cohere2", SLIDING | {"logit_scale": 0.25}),
    "cwm": ("Cwm", SLIDING | {"head_dim": 8}),
    "dbrx": ("Dbrx", {}),
    "deepseek_v2": ("DeepseekV2", LATENT | GROUPED | {"first_k_dense_replace": 1}),
    "deepseek_v3": ("DeepseekV3", LATENT | GROUPED | {"n_group": 2, "first_k_dense_replace": 1}),
    "deepseek_v32": ("DeepseekV32", INDEXED),
    "diffllama": ("DiffLlama", {}),
    "dots1": ("Dots1", HEAD | GROUPED | {"n_shared_experts": 1}),
    "ernie4_5": ("Ernie4_5", HEAD),
    "ernie4_5_moe": ("Ernie4_5_Moe", HEAD | {"moe_num_experts": 4, "moe_k": 2}),
    "exaone4": ("Exaone4", SLIDING),
    "exaone_moe": ("ExaoneMoe", SLIDING | EXPERTS),
    "falcon": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_h1": (
        "FalconH1",
        MAMBA
        | {"mamba_d_ssm": 32, "mamba_d_head": 8}
        | {"embedding_multiplier": 2.0, "lm_head_multiplier": 0.5},
    ),
    "flex_olmo": ("FlexOlmo", {"num_experts": 4, "num_experts_per_tok": 2}),
    "gemma": ("Gemma", HEAD),
    "gemma2": (
        "Gemma2",
        SCALAR | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    ),
    "gemma3_text": ("Gemma3+Text", SCALAR),
    "gemma3n_text": ("Gemma3n+Text", GEMMA3N),
    "gemma4_text": ("Gemma4+Text", GEMMA4),
    "glm": ("Glm", HEAD),
    "glm4": ("Glm4", HEAD),
    "glm4_moe": ("Glm4Moe", HEAD | GROUPED),
    "glm4_moe_lite": (
        "Glm4MoeLite",
        LATENT | GROUPED | {"mlp_layer_types": ["dense"] + ["sparse"] * 7},
    ),
    "glm_moe_dsa": ("GlmMoeDsa", INDEXED),
    "gpt2": ("GPT2", {}),
    "gpt_bigcode": ("GPTBigCode", {}),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt_oss": ("GptOss", HEAD | SLIDING | LOCAL),
    "gptj": ("GPTJ", {}),
    "granite": ("Granite", GRANITE | {"logits_scaling": 8.0, "attention_multiplier": 0.0156}),
    "granite_ls1": ("Granite", GRANITE | {"logits_scaling": 1.0, "attention_multiplier": 0.25}),
    "granitemoe": ("GraniteMoe", LOCAL | {"embedding_multiplier": 12.0, "logits_scaling": 6.0}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        MAMBA
        | LOCAL
        | {"embedding_multiplier": 12.0}
        | {"layer_types": ["attention"] * 8, "shared_intermediate_size": 32},
    ),
    "granitemoeshared": (
        "GraniteMoeShared",
        LOCAL | {"embedding_multiplier": 12.0} | {"shared_intermediate_size": 32},
    ),
    "granitemoe_mamba": (
        "GraniteMoeHybrid",
        MAMBA
        | LOCAL
        | {"shared_intermediate_size": 32}
        | {"layer_types": ["mamba", "mamba", "attention", "mamba"] * 2},
    ),
    "helium": ("Helium", {"head_dim": 8}),
    "hunyuan": ("HunYuanDenseV1", HEAD),
    "hunyuan_moe": ("HunYuanMoEV1", HEAD | {"num_experts": 4, "moe_topk": 2}),
    "hyperclovax": ("HyperCLOVAX", {}),
    "jamba": (
        "Jamba",
        {"num_experts": 2, "attn_layer_period": 4, "attn_layer_offset": 1}
        | {"use_mamba_kernels": False},
    ),
    "kimi_linear": (
        "KimiLinear",
        LATENT
        | EXPERTS
        | {"q_lora_rank": None, "num_local_experts": 4}
        | {"linear_head_dim": 8, "linear_num_heads": 4},
    ),
    "lfm2": ("Lfm2", {"full_attn_idxs": [2, 5]}),
    "llama": ("Llama", {}),
    "llama3rope": ("Llama", long_rope("llama3", 4096, 512, **LLAMA3_ROPE)),
    "llama4_text": ("Llama4+Text", LLAMA4),
    "llama_bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_dynamic": ("Llama", rope("dynamic", factor=4.0)),
    "llama_headdim": ("Llama", HEAD),
    "llama_linear": ("Llama", rope("linear", factor=2.0)),
    "llama_padvocab": ("Llama", {"vocab_size": 320}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama_yarn": ("Llama", long_rope("yarn", 2048, 512, factor=4.0)),
    "longcat_flash": (
        "LongcatFlash",
        LATENT
        | {"num_hidden_layers": 16, "head_dim": 8}  # two attentions a layer
        | {"n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2}
        | {"ffn_hidden_size": 64, "expert_ffn_hidden_size": 16},
    ),
    "mamba2": ("Mamba2", {}),
    "mimo_v2_flash": ("MiMoV2Flash", HEAD),
    "minicpm3": ("MiniCPM3", LATENT | {"scale_emb": 12, "dim_model_base": 16, "scale_depth": 1.4}),
    "minimax": ("MiniMax", HEAD | LOCAL),
    "minimax_m2": ("MiniMaxM2", HEAD | LOCAL),
    "ministral": ("Ministral", HEAD | SLIDING),
    "ministral3": ("Ministral3", HEAD),
    "mistral": ("Mistral", HEAD | SLIDING),
    "mixtral": ("Mixtral", LOCAL),
    "mpt": ("Mpt", {}),
    "nanochat": ("NanoChat", {}),
    "nemotron": ("Nemotron", {"head_dim": 8}),
    "nemotron_h": (
        "NemotronH",
        HEAD
        | ROUTED
        | {"mamba_num_heads": 4, "mamba_head_dim": 16}
        | {"layers_block_type": ["mamba", "attention", "mamba", "moe"] * 2}
        | {"ssm_state_size": 8, "n_groups": 1}
        | {"moe_shared_expert_intermediate_size": 16},
    ),
    "olmo": ("Olmo", {}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", SLIDING),
    "olmo_hybrid": ("OlmoHybrid", {}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "opt": ("OPT", {}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {}),
    "phi3_longrope": (
        "Phi3",
        long_rope("longrope", 2048, 256, short_factor=[1.0] * 4, long_factor=[2.0] * 4),
    ),
    "phi3_partial": ("Phi3", {"partial_rotary_factor": 0.5}),
    "phimoe": ("Phimoe", LOCAL | {"lm_head_bias": True, "attention_bias": True}),
    "qwen2": ("Qwen2", {}),
    "qwen2_moe": ("Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen2_sw": ("Qwen2", SLIDING | {"use_sliding_window": True, "max_window_layers": 4}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", HEAD),
    "qwen3_5_text": ("Qwen3_5+Text", LINEAR),
    "qwen3_moe": ("Qwen3Moe", HEAD | EXPERTS),
    "qwen3_next": ("Qwen3Next", LINEAR | EXPERTS | {"shared_expert_intermediate_size": 16}),
    "recurrent_gemma": ("RecurrentGemma", {"lru_width": 32, "attention_window_size": 16}),
    "seed_oss": ("SeedOss", HEAD),
    "smollm3": ("SmolLM3", {}),
    "smollm3_nope": ("SmolLM3", {"no_rope_layer_interval": 4}),
    "solar_open": ("SolarOpen", HEAD | ROUTED),
    "stablelm": ("StableLm", {}),
    "starcoder2": ("Starcoder2", {}),
    "vaultgemma": ("VaultGemma", SCALAR),
    "xglm": ("XGLM", {}),
    "zamba2": (
        "Zamba2",
        {"mamba_d_state": 8, "mamba_headdim": 16, "n_mamba_heads": 4}
        | {"layers_block_type": ["mamba", "hybrid", "mamba", "mamba"] * 2}
        | {"mamba_ngroups": 1, "adapter_rank": 4, "num_mem_blocks": 1},
    ),
}
