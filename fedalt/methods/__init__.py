"""What a method trains, sends, combines and installs; aggregation as pure functions."""

from fedalt.methods.fedalt import get_method
from fedalt.methods.method import Combined, Method, Round
from fedalt.methods.robust import Clipped, change_norm, exact, fault, out_of_proportion
from fedalt.methods.server import Total, Update, mean, rest_of_world, total

__all__ = [
    "Clipped",
    "Combined",
    "Method",
    "Round",
    "Total",
    "Update",
    "change_norm",
    "exact",
    "fault",
    "get_method",
    "mean",
    "out_of_proportion",
    "rest_of_world",
    "total",
]
