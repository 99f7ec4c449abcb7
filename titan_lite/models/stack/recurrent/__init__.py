"""A core of layers that runs many times."""

from titan_lite.models.stack.recurrent.stack import RecurrentStack as RecurrentStack
