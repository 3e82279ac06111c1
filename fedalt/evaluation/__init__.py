"""Scores of a client on its test records, texts and images alike."""

from fedalt.evaluation.answers import Answers
from fedalt.evaluation.evaluate import Examined
from fedalt.evaluation.tasks import ImageTask, Task, TextTask

__all__ = ["Answers", "Examined", "ImageTask", "Task", "TextTask"]
