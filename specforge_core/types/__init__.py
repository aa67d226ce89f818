"""The values that pass between hooks, in the order data flows through a run.

No I/O, no registry, no config here.  torch is imported for typing only, so importing this is
cheap.  Every value is built with keywords, so that fields can be added.
"""

from .capture import (
    Adapter as Adapter,
    CaptureSpec as CaptureSpec,
    Field as Field,
    FinalState as FinalState,
    Generated as Generated,
    GenerateOptions as GenerateOptions,
    Problem as Problem,
    Prompt as Prompt,
    Sample as Sample,
    TargetCapture as TargetCapture,
    TargetEngine as TargetEngine,
    TargetInfo as TargetInfo,
)
from .serving import (
    DraftServer as DraftServer,
    Export as Export,
    ExportFile as ExportFile,
    NotServed as NotServed,
    Proposal as Proposal,
    Proposer as Proposer,
    Sampling as Sampling,
    ServedAnswer as ServedAnswer,
)
from .training import (
    DOCUMENT_IDS as DOCUMENT_IDS,
    POSITION_IDS as POSITION_IDS,
    RESERVED_METRICS as RESERVED_METRICS,
    Batch as Batch,
    Collate as Collate,
    Counting as Counting,
    DataInfo as DataInfo,
    Draft as Draft,
    Float8Heads as Float8Heads,
    GrowingReader as GrowingReader,
    Planned as Planned,
    Ratio as Ratio,
    Reader as Reader,
    Simulator as Simulator,
    StepContext as StepContext,
    StepOutput as StepOutput,
    Tracker as Tracker,
    TrainStep as TrainStep,
    Transform as Transform,
)
