"""Work that says what it does, run to its end."""


def finish(work):
    """(what it returns, what it said on the way)"""
    events = []
    while True:
        try:
            events.append(next(work))
        except StopIteration as stop:
            return stop.value, events


def result(work):
    """What it returns."""
    return finish(work)[0]
