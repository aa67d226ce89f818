"""What a training step holds, by its shapes, on a GPU with compiled layers.

N slots of all blocks, S context tokens, H hidden size, I the MLP's inner one.
"""

from __future__ import annotations

from specforge_core.float8 import STEP

from .config import DFlashConfig, DraftShape, objective


def step_bytes(
    config: DFlashConfig,
    shape: DraftShape,
    tokens: int,
    documents: int,
    item: int,
    *,
    recompute: bool,
    float8: bool = False,
) -> dict[str, int]:
    """Return bytes by what they are for, as `types.Planned` says."""
    each = min(config.num_anchors, max(tokens // documents - 1, 1))
    slots = documents * each * shape.block_size
    rows = documents * each * (shape.block_size - config.first_slot)
    width, inner = shape.hidden_size, shape.intermediate_size
    wide, narrow = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    # queries and keys before and behind norm and rotation, values; attention's output and
    # log-sum-exps; the state between attention and MLP, and the MLP's two products
    layer = item * (slots * (3 * wide + 3 * narrow + width + 2 * inner) + tokens * 3 * narrow)
    layer += 4 * slots * shape.num_heads
    inputs = item * slots * width
    kept = shape.num_layers * inputs + (1 if recompute else shape.num_layers) * layer
    # of the head: its rows, the states they were taken from, the logits of a chunk; the teacher's
    kl = 1 if objective(config).loss == "kl" else 0
    logits = min(config.head_chunk, rows) * shape.vocab_size
    head = item * (slots * width + (1 + kl) * (rows * width + logits))
    narrow_head = float8 and not kl and shape.vocab_size % STEP == 0
    if narrow_head:
        head += rows * width
    # of the backward pass: the head's rows and states, then the MLP's inner gradients
    back = item * (rows * width + slots * (2 * width + 3 * inner))
    if float8:  # those of both products, by rows and by columns, and what they are multiplied with
        back += slots * ((4 - item) * inner + width) + 2 * inner * width
    made = "the gradients of the states on the way" if back > head else "logits of a chunk of rows"
    return {
        "the head in float8": shape.vocab_size * width if narrow_head else 0,
        "the batch": item * tokens * (len(shape.capture_layers) + kl) * width + 8 * 3 * slots,
        "what the layers keep": kept,
        "the context and the head's gradient": item * (2 * tokens + rows) * width,
        made: max(head, back),
    }
