from __future__ import annotations

import select
import threading

from pd_serve.transfer.mailbox import Mailbox


def readable(box: Mailbox[int]) -> bool:
    return bool(select.select([box], [], [], 0)[0])


def test_readable_exactly_while_something_waits() -> None:
    box: Mailbox[int] = Mailbox()
    assert not readable(box)
    box.put(1)
    box.put(2)
    assert readable(box)
    assert box.take() == [1, 2]
    assert not readable(box)
    assert box.take() == []
    box.close()
    box.put(3)  # late, and ignored


def test_nothing_is_lost_between_threads() -> None:
    box: Mailbox[int] = Mailbox()
    threads = [threading.Thread(target=lambda n=n: [box.put(n * 1000 + i) for i in range(1000)]) for n in range(4)]
    for thread in threads:
        thread.start()
    got: list[int] = []
    while len(got) < 4000:
        assert select.select([box], [], [], 5)[0]
        got += box.take()
    for thread in threads:
        thread.join()
    assert sorted(got) == list(range(4000))
    for n in range(4):  # each thread's in its own order
        mine = [x for x in got if x // 1000 == n]
        assert mine == sorted(mine)
    box.close()
