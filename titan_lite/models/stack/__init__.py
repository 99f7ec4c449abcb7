"""The order in which blocks run."""

from titan_lite.models.stack.base import Executions as Executions
from titan_lite.models.stack.base import Stack as Stack
from titan_lite.models.stack.base import Streams as Streams
from titan_lite.models.stack.plain import PlainStack as PlainStack
from titan_lite.models.stack.recurrent import RecurrentStack as RecurrentStack
from titan_lite.models.stack.shared import ScheduledStack as ScheduledStack
from titan_lite.models.stack.shared import SharedStack as SharedStack
