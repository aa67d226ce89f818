"""A method that is at its best after four steps."""

from __future__ import annotations

# learns until step 4, and forgets from there on
PEAK = """
    from specforge_core import hookimpl
    from specforge_core.types import StepOutput
    import specforge_linear
    from specforge_linear import (
        specforge_adapter, specforge_config, specforge_draft, specforge_export,
        specforge_proposer)
    @hookimpl
    def specforge_train_step():
        def step(draft, batch, ctx):
            out = specforge_linear.train_step(draft, batch, ctx)
            sign = 1 if ctx.step < 4 or not ctx.training else -50
            return StepOutput(
                loss_sum=out.loss_sum * sign, weight=out.weight, metrics=out.metrics)
        return step
    """
