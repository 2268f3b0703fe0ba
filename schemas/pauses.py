"""Short pauses: what a process has loaded is no business of its garbage collector."""

import gc


def spare_what_is_loaded() -> None:
    """Has full collections pass over every object there is by now. Call it once, when all is ready.

    Python's collector stops the whole process. With torch, Kafka and Avro imported, a full pass
    over some 500,000 objects that live for ever takes 50 to 90 ms, and comes every few seconds
    while windows and queues fill: that was the p99 of a quiet lane.
    """
    gc.collect()
    gc.freeze()
