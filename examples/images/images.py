"""One process decodes real pictures and sends them, another computes on the arrays it receives.

    python examples/images/images.py [--frames N] [--rounds N] [--step N] [--decode-each]

The pictures are those inside the scikit-image package (``pip install scikit-image dsline``). The same job
runs over a dsline channel and over multiprocessing.Queue, in turn, each time between two new processes.
Timed is the way from the first send of the decoder to the last result of the analyst; starting the
processes and one pass over all pictures come before. The results of both must equal those computed without
any second process.
"""

import argparse
import itertools
import multiprocessing
import multiprocessing.connection
import statistics
import sys
import time

import numpy as np

import dsline

PICTURES = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")
QUEUED = 8


def decode(name):
    """Read one of the pictures that scikit-image ships: height x width x RGB, uint8."""
    from skimage import data

    return getattr(data, name)()


def analyse(frame, step):
    """Return mean red, green, blue and the edge energy of every step-th pixel."""
    preview = frame[::step, ::step].astype(np.float32)
    down, right = np.gradient(preview.mean(axis=2))
    return (*preview.mean(axis=(0, 1), dtype=np.float64), np.hypot(down, right).mean(dtype=np.float64))


def frames(count, decode_each):
    """Yield the pictures in turn; without decode_each they are decoded before the first is asked for."""
    if decode_each:
        return map(decode, itertools.islice(itertools.cycle(PICTURES), count))
    return frames_of({name: decode(name) for name in PICTURES}, count)


def frames_of(pictures, count):
    return itertools.islice(itertools.cycle(pictures.values()), count)


# The job over a dsline channel.


def send_by_dsline(channel, pictures):
    for picture in pictures:
        channel.send(picture)


def receive_by_dsline(channel, count):
    for view in itertools.islice(channel, count):
        yield np.asarray(view)


# The same over multiprocessing.Queue.


def send_by_queue(queue, pictures):
    for picture in pictures:
        queue.put(picture)


def receive_by_queue(queue, count):
    for _ in range(count):
        yield queue.get()


TRANSPORTS = {
    "dsline": (lambda context: dsline.ShmChannel(capacity=QUEUED), send_by_dsline, receive_by_dsline),
    "multiprocessing.Queue": (lambda context: context.Queue(QUEUED), send_by_queue, receive_by_queue),
}


def decoder(transport, link, start, report, options):
    _, send, _ = TRANSPORTS[transport]
    warmup = frames(len(PICTURES), options.decode_each)
    timed = frames(options.frames, options.decode_each)
    send(link, warmup)
    start.wait(60)
    report.send(time.monotonic())
    send(link, timed)


def analyst(transport, link, start, report, options):
    _, _, receive = TRANSPORTS[transport]
    for frame in receive(link, len(PICTURES)):
        analyse(frame, options.step)
    start.wait(60)
    results = [analyse(frame, options.step) for frame in receive(link, options.frames)]
    report.send((time.monotonic(), results))


def run(transport, options):
    """Run the job once between two new processes; return frames per second and all results."""
    context = multiprocessing.get_context("spawn")
    link = TRANSPORTS[transport][0](context)
    start = context.Barrier(2)
    pipes, processes = [], []
    for role in (decoder, analyst):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=role, args=(transport, link, start, theirs, options), daemon=True)
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    try:
        started, (ended, results) = [receive_report(pipe, processes) for pipe in pipes]
    finally:
        for process in processes:
            process.join(5)
            process.kill()
            process.join()
        link.close()
    return options.frames / (ended - started), results


def receive_report(pipe, processes):
    """Return what a process reports; the failure of either one ends the wait."""
    while not pipe.poll(0.2):
        if any(process.exitcode for process in processes):
            sys.exit("a worker process failed; its traceback is above")
    try:
        return pipe.recv()
    except EOFError:
        sys.exit("a worker process failed; its traceback is above")


def main():
    parser = argparse.ArgumentParser(description="Send decoded pictures to a second process, two ways.")
    parser.add_argument("--frames", type=int, default=210, help="pictures per run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each way, in turn (%(default)s)")
    parser.add_argument("--step", type=int, default=8, help="compute on every step-th pixel (%(default)s)")
    parser.add_argument("--decode-each", action="store_true", help="decode again for every frame, not once")
    options = parser.parse_args()
    if min(options.frames, options.rounds, options.step) < 1:
        parser.error("--frames, --rounds and --step must be at least 1")
    try:
        pictures = {name: decode(name) for name in PICTURES}
    except ImportError:
        sys.exit("images.py needs the pictures of scikit-image: pip install scikit-image")
    expected = {name: analyse(picture, options.step) for name, picture in pictures.items()}
    start = time.monotonic()
    in_turn = [analyse(frame, options.step) for frame in frames_of(pictures, options.frames)]
    alone = options.frames / (time.monotonic() - start)

    rates = {transport: [] for transport in TRANSPORTS}
    for _ in range(options.rounds):
        for transport in TRANSPORTS:
            rate, results = run(transport, options)
            if results != in_turn:
                sys.exit(f"{transport}: the results differ from those computed without a second process")
            rates[transport].append(rate)

    print(f"{'picture':<22}{'shape':<18}{'red':>7}{'green':>7}{'blue':>7}{'edges':>7}")
    for name, picture in pictures.items():
        figures = "".join(f"{figure:7.1f}" for figure in expected[name])
        print(f"{name:<22}{' x '.join(map(str, picture.shape)):<18}{figures}")
    size = statistics.mean(picture.nbytes for picture in pictures.values()) / 1e6
    source = "decoded for every frame" if options.decode_each else "decoded once"
    print(
        f"\n{options.frames} frames of {size:.1f} MB on average ({source}), {options.rounds} rounds, median:"
    )
    medians = {transport: statistics.median(values) for transport, values in rates.items()}
    for transport, values in rates.items():
        spread = f"({min(values):,.0f} to {max(values):,.0f})"
        print(f"  {transport:<22}{medians[transport]:>8,.0f} frames/s  {spread}")
    if not options.decode_each:
        print(f"  {'computing alone':<22}{alone:>8,.0f} frames/s  (no second process: the limit of both)")
    ratio = medians["dsline"] / medians["multiprocessing.Queue"]
    print(f"  dsline is {ratio:.1f} times as fast; all results are equal")


if __name__ == "__main__":
    main()
