"""The values that pass between hooks, in the order data flows through a run.

No I/O, no registry, no config here.  torch is imported for typing only, so importing this is
cheap.  Every value is built with keywords, so that fields can be added.
"""

from .capture import (
    Adapter as Adapter,
)
from .capture import (
    CaptureSpec as CaptureSpec,
)
from .capture import (
    Field as Field,
)
from .capture import (
    FinalState as FinalState,
)
from .capture import (
    Generated as Generated,
)
from .capture import (
    GenerateOptions as GenerateOptions,
)
from .capture import (
    Problem as Problem,
)
from .capture import (
    Prompt as Prompt,
)
from .capture import (
    Sample as Sample,
)
from .capture import (
    TargetCapture as TargetCapture,
)
from .capture import (
    TargetEngine as TargetEngine,
)
from .capture import (
    TargetInfo as TargetInfo,
)
from .serving import (
    DraftServer as DraftServer,
)
from .serving import (
    Export as Export,
)
from .serving import (
    NotServed as NotServed,
)
from .serving import (
    Proposal as Proposal,
)
from .serving import (
    Proposer as Proposer,
)
from .serving import (
    Sampling as Sampling,
)
from .serving import (
    ServedAnswer as ServedAnswer,
)
from .training import (
    DOCUMENT_IDS as DOCUMENT_IDS,
)
from .training import (
    POSITION_IDS as POSITION_IDS,
)
from .training import (
    RESERVED_METRICS as RESERVED_METRICS,
)
from .training import (
    Batch as Batch,
)
from .training import (
    Collate as Collate,
)
from .training import (
    DataInfo as DataInfo,
)
from .training import (
    Draft as Draft,
)
from .training import (
    GrowingReader as GrowingReader,
)
from .training import (
    Ratio as Ratio,
)
from .training import (
    Reader as Reader,
)
from .training import (
    Simulator as Simulator,
)
from .training import (
    StepContext as StepContext,
)
from .training import (
    StepOutput as StepOutput,
)
from .training import (
    Tracker as Tracker,
)
from .training import (
    TrainStep as TrainStep,
)
from .training import (
    Transform as Transform,
)
