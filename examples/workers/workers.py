"""A pool of workers that are killed at random while every picture is still processed.

    python examples/workers/workers.py [--seconds N] [--workers N] [--seed N]

Real pictures (those inside the scikit-image package, ``pip install scikit-image dsline``) go through a channel to
workers that measure them; the results come back through another one. All the while workers are killed with SIGKILL,
most of them in the middle of a picture, and replaced. Nobody keeps a list of who works on what: a picture whose worker
died comes to another worker. One that has lost as many workers as `--max-deliveries` says becomes a dead letter, so
that a picture which kills its workers could not stop the others; here the pictures are innocent, and their letters are
revived. At the end every picture has a result, equal to the one computed without any worker.
"""

import argparse
import multiprocessing
import random
import sys
import threading
import time

import numpy as np

import dsline

PICTURES = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")
QUEUED = 16
ANSWERS = 4  # at a time: they are taken at once
LIMIT = 60  # seconds after the last picture was sent; far more than is needed


def measure(picture):
    """Return brightness, contrast and the energy of the edges of a preview: about a hundredth of a second of work."""
    grey = picture[::2, ::2].astype(np.float32).mean(axis=2)
    down, right = np.gradient(grey)
    edges = np.hypot(down, right)
    return np.array(
        [grey.mean(dtype=np.float64), *np.percentile(grey, (5, 50, 95)), edges.mean(dtype=np.float64)]
    )


def work(pictures, results):
    """Measure pictures until there are no more of them: the whole of a worker."""
    parent = multiprocessing.parent_process()
    while parent.is_alive():
        try:
            message = pictures.recv_message(timeout=1)
        except dsline.BufferEmptyError:
            continue
        except dsline.ChannelClosedError:
            return
        # The picture is done when the block ends. Killed before, this worker has not had it.
        with message:
            answer, meta = measure(message.array()), {**message.meta, "attempt": message.attempt}
            while parent.is_alive():  # whoever takes the answers may be gone while they are all in use
                try:
                    results.send(answer, meta=meta, timeout=1)
                    break
                except dsline.BufferFullError:
                    continue


class Pool:
    """Workers of which one may die at any time."""

    def __init__(self, size, channels, seed):
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["numpy", "dsline"])  # so that a new worker starts at once
        self._channels = channels
        self._random = random.Random(seed)
        self._next_kill = 0.0
        self.killed = 0
        self._workers = [self._start() for _ in range(size)]

    def _start(self):
        worker = self._context.Process(target=work, args=self._channels, daemon=True)
        worker.start()
        return worker

    def kill_now_and_then(self):
        """Kill one of them and start another one, some times a second."""
        if time.monotonic() < self._next_kill:
            return
        victim = self._random.randrange(len(self._workers))
        self._workers[victim].kill()  # SIGKILL
        self._workers[victim].join()
        self._workers[victim] = self._start()
        self.killed += 1
        self._next_kill = time.monotonic() + self._random.uniform(0.02, 0.4)

    def join(self):
        for worker in self._workers:
            worker.join(10)
            worker.kill()
            worker.join()


class Feeder(threading.Thread):
    """Sends the pictures in turn, numbered, for some seconds."""

    def __init__(self, channel, pictures, seconds):
        super().__init__(daemon=True)
        self._channel, self._pictures, self._seconds = channel, pictures, seconds
        self.sent = 0

    def run(self):
        names = list(self._pictures)
        end = time.monotonic() + self._seconds
        while time.monotonic() < end:
            name = names[self.sent % len(names)]
            self._channel.send(self._pictures[name], meta={"number": self.sent, "name": name})
            self.sent += 1


def run(options, pictures):
    """Return the results by number of the picture, the feeder, the pool, and what was counted."""
    results = {}
    counted = {"repeated": 0, "twice": 0, "letters": 0, "deaths": 0}
    with (
        dsline.ShmChannel(capacity=QUEUED, max_deliveries=options.max_deliveries) as tasks,
        dsline.ShmChannel(capacity=ANSWERS) as answers,
    ):

        def note_death(death):
            counted["deaths"] += 1

        tasks.on_peer_death(note_death)
        pool = Pool(options.workers, (tasks, answers), options.seed)
        feeder = Feeder(tasks, pictures, options.seconds)
        feeder.start()
        deadline = time.monotonic() + options.seconds + LIMIT
        try:
            while feeder.is_alive() or len(results) < feeder.sent:
                if time.monotonic() > deadline:
                    sys.exit(f"only {len(results)} of {feeder.sent} pictures came back; {tasks.inspect()}")
                pool.kill_now_and_then()
                tasks.check_peers()
                for letter in tasks.dead_letters():
                    counted["letters"] += 1
                    letter.revive()
                try:
                    answer = answers.recv_message(timeout=0.02)
                except dsline.BufferEmptyError:
                    continue
                with answer:
                    number, name, attempt = (answer.meta[key] for key in ("number", "name", "attempt"))
                    counted["repeated"] += attempt > 1
                    # A worker may die between its answer and the end of its picture: then the answer comes twice.
                    counted["twice"] += number in results
                    results[number] = (name, answer.array(copy=True))
        finally:
            tasks.shutdown()
            pool.join()
    return results, feeder.sent, pool.killed, counted


def main():
    parser = argparse.ArgumentParser(description="Process pictures with workers that are killed at random.")
    parser.add_argument("--seconds", type=float, default=15, help="how long pictures are sent (%(default)s)")
    parser.add_argument("--workers", type=int, default=3, help="how many work at a time (%(default)s)")
    parser.add_argument(
        "--max-deliveries",
        type=int,
        default=2,
        help="workers that a picture may cost before it is set aside (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the choice of victims (%(default)s)")
    options = parser.parse_args()
    if options.seconds <= 0 or not 1 <= options.workers <= 30 or not 1 <= options.max_deliveries <= 15:
        parser.error("--seconds must be above 0, --workers 1 to 30, --max-deliveries 1 to 15")
    try:
        from skimage import data
    except ImportError:
        sys.exit("workers.py needs the pictures of scikit-image: pip install scikit-image")
    pictures = {name: getattr(data, name)() for name in PICTURES}
    expected = {name: measure(picture) for name, picture in pictures.items()}

    start = time.monotonic()
    results, sent, killed, counted = run(options, pictures)
    seconds = time.monotonic() - start

    missing = [number for number in range(sent) if number not in results]
    wrong = [
        number for number, (name, figures) in results.items() if not np.array_equal(figures, expected[name])
    ]
    print(f"{sent} pictures sent, {len(results)} processed by {options.workers} workers in {seconds:.1f} s")
    print(
        f"  {killed} workers killed (SIGKILL), {counted['deaths']} handles found dead by the kernel locks they held"
    )
    print(f"  {counted['repeated']} pictures went to another worker after one had died")
    print(
        f"  {counted['letters']} times a picture had lost {options.max_deliveries} workers and was set aside and revived"
    )
    print(
        f"  {counted['twice']} results came twice: their workers died between the answer and the end of the picture"
    )
    print(
        f"  {len(missing)} pictures missing, {len(wrong)} results differ from those computed without workers"
    )
    if missing or wrong or not killed:
        sys.exit(
            "the promise was broken" if missing or wrong else "nobody was killed; give it more --seconds"
        )


if __name__ == "__main__":
    main()
