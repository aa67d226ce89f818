"""What a training step holds, by its shapes, on a GPU with compiled halves of the layer.

N tokens, R steps over them, H hidden size, I the MLP's inner one, Q that of queries, keys, values.
"""

from __future__ import annotations

from specforge_core.float8 import STEP

from .config import DraftShape, Eagle3Config


def step_bytes(
    config: Eagle3Config,
    shape: DraftShape,
    tokens: int,
    item: int,
    *,
    recompute: bool,
    float8: bool = False,
) -> dict[str, int]:
    """Return bytes by what they are for, as `types.Planned` says; every token has a label."""
    steps, vocab = config.steps, shape.draft_vocab_size
    width, inner = shape.hidden_size, shape.intermediate_size
    wide, narrow = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    joint = wide + 2 * narrow
    # what the weights are multiplied with, for their gradients; queries, keys, values; the state
    # that a step hands on; log-sum-exps
    step = 2 * width + wide + inner + joint + width
    if not recompute:  # the state between attention and MLP, and the MLP's two products
        step += width + 2 * inner + (joint - narrow if shape.qk_norm else 0)
    kept = steps * tokens * (item * step + 4 * shape.num_heads)
    if float8:  # until the end of the backward pass, what all steps' products read and gave back
        ends = 2 * width + wide + inner + joint + 2 * width + 2 * inner
        kept = max(kept, item * steps * tokens * ends)
    states = item * steps * tokens * width  # of all steps, as the head reads them
    chunk = min(config.head_chunk, steps * tokens)
    logits = item * vocab * (chunk + chunk // steps)
    summed = 4 * vocab * width if config.train_head else 0  # the head's gradient
    layer = item * width * (2 * joint + wide + 3 * inner)
    head = summed + 2 * states + logits
    if float8 and vocab % STEP == 0:  # the weight and the rows
        head += vocab * width + steps * tokens * width
    # the head's gradient is narrow by now; those of the layer's weights are summed over its steps
    back = (
        summed * item // 4 + 2 * states + layer - item * width * joint + item * 3 * inner * tokens
    )
    made = "the weights' gradients on the way" if back > head else "the head's gradient and logits"
    if float8:  # at the end, the first of what all steps gave, below each other
        back += item * steps * tokens * width
    return {
        # by columns; what the results read is gone when the steps are done
        "the weights in float8": layer // item - width * joint if float8 else 0,
        "the batch": item * tokens * (len(shape.capture_layers) + 1) * width,
        "the rows of the target's head": item * vocab * width,
        "what the steps keep": kept,
        "the embeddings' half and the head's gradient": states
        + item * (tokens * (2 * joint + width) + 2 * joint * width),
        made: max(head, back),
    }
