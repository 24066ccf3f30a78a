"""What a run notices: z-scores, tasks beside it."""

import random
import threading

from gpt.journal import Aside, Watch


def test_z_scores_are_those_of_the_last_hundred():
    rng, watch = random.Random(0), Watch()
    for i in range(400):
        loss, norm = rng.gauss(3, 0.1), rng.gauss(1, 0.05)
        scores = watch.score(loss, norm)
        assert (scores == (None, None)) == (i < Watch.FIRST)
        watch.learn(loss, norm)
    assert abs(watch.z('loss', 3.5) - 5) < 1 and abs(watch.z('norm', 0.9) + 2) < 0.7
    assert watch.score(float('nan'), float('inf')) == (None, None)
    again = Watch(watch.state)
    assert again.score(3.3, 1.1) == watch.score(3.3, 1.1)
    again.learn(9.0, 9.0)
    assert again.state != watch.state                               # a copy


def test_a_loss_that_falls_is_no_spike():
    watch = Watch()
    for i in range(300):
        loss = 8 * 0.99 ** i + 2
        z = watch.score(loss, 1.0)[0]
        assert z is None or z < 1
        watch.learn(loss, 1.0)


def test_tasks_are_done_in_order_beside_the_run_until_one_fails():
    done, said, wait = [], [], threading.Event()
    aside = Aside(said.append, 'mirror')
    aside.do(lambda: wait.wait(10))
    aside.do(lambda: done.append(1))
    assert not done
    wait.set()
    aside.do(lambda: 1 / 0)
    aside.do(lambda: done.append(2))
    aside.end(10)
    assert done == [1] and said == ['mirror: ZeroDivisionError: division by zero; going on '
                                    'without it']
