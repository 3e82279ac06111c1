"""Flower's ClientApp. Its node config: ``site``, the path of the site's own settings."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedalt.config import load_site
from fedalt.errors import InputError
from fedalt.flower.parcel import HELLO, LAST, ROUND, Parcel
from fedalt.flower.secagg import is_masked, masked_turn, secure
from fedalt.flower.site import Site
from fedalt.flower.wire import from_records, to_records

app = ClientApp()


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Who this site is, and on which base."""
    return _answer(HELLO, message, context)


@app.train(mods=[secure])
def one_round(message: Message, context: Context) -> Message:
    """Take the last sum in, score what that makes, train the round, hand in."""
    if is_masked(message):
        return masked_turn(_site(context), message)
    return _answer(ROUND, message, context)


@app.evaluate()
def after_the_last(message: Message, context: Context) -> Message:
    """Take the last sum in, score, and write the client's report."""
    return _answer(LAST, message, context)


def _site(context: Context) -> Site:
    return Site(load_site(str(context.node_config.get("site", ""))))


def _answer(kind: str, message: Message, context: Context) -> Message:
    try:
        answer = _site(context).answer(kind, from_records(message.content))
    except InputError as error:
        answer = Parcel({"refused": str(error)})
    return Message(to_records(answer), reply_to=message)
