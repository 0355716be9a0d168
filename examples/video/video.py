"""A film through two workers that find edges, while a slow viewer watches and one of the workers is killed.

    python examples/video/video.py [--frames N] [--height N] [--width N] [--keep FOLDER] [--no-kill]

The film is made of the pictures inside the scikit-image package: a camera moves over them (``pip install "dsline[examples]"``).
Then it is decoded again, frame by frame, in a pipeline::

    film ─▶ edges (2 worker processes) ─┬─▶ batches of 16 ─▶ edges.npy
                                        └─▶ a broadcast ─▶ viewer, a process that is too slow for all frames

A third of the way one worker is killed: its frame is given to the other, and a new worker is started in its place. At the
end every frame of the file is compared with what one process alone computes, and so is what the viewer saw.
"""

import argparse
import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import dsline

PICTURES = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")
PER_PICTURE = 25


def make_film(path, count, height, width):
    """Encode a film in which a camera moves over the pictures that scikit-image ships."""
    import av
    from skimage import data

    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "mpeg4", rate=25, width=width, height=height, pix_fmt="yuv420p", bit_rate=8_000_000
        )
        for number in range(count):
            picture = getattr(data, PICTURES[number // PER_PICTURE % len(PICTURES)])()
            repeats = -(-2 * height // picture.shape[0]), -(-2 * width // picture.shape[1]), 1
            picture = np.tile(picture, repeats)
            step = number % PER_PICTURE * 2
            frame = np.ascontiguousarray(picture[step : step + height, 2 * step : 2 * step + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def decode(path):
    """Yield the frames of a film: height x width x RGB, uint8."""
    import av

    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


class Edges:
    """Sobel's filter on the grey picture. Made once in each worker."""

    def __init__(self):
        from skimage import filters

        self.sobel = filters.sobel

    def __call__(self, frame):
        grey = frame.mean(axis=2, dtype=np.float32) / 255
        return np.clip(self.sobel(grey) * 510, 0, 255).astype(np.uint8)


def watch(channel, pause, seen):
    """Look at the newest frame, think about it for a while, look again."""
    with channel.subscribe() as viewer:
        seen.send("ready")
        found = []
        with contextlib.suppress(dsline.ChannelClosedError):
            while True:
                with viewer.recv_message() as message:
                    found.append((message.sequence, int(np.asarray(message.array()).sum(dtype=np.int64))))
                time.sleep(pause)
        seen.send((found, viewer.lost))
    channel.close()


class Killer:
    """Hands frames on, and kills a worker of a stage when one of them comes by."""

    def __init__(self, stage, number):
        self.stage = stage
        self.number = number
        self.run = None
        self.killed = None

    def __call__(self, frame):
        self.number -= 1
        if self.number == 0 and self.run is not None:
            self.killed = self.run.pids()[self.stage][0]
            os.kill(self.killed, signal.SIGKILL)
        return frame


def run_pipeline(film, target, options, view):
    """Run the film through the pipeline; return its report and which process was killed."""
    killer = Killer("edges", options.frames // 3 if options.kill else 0)
    edges, shown = (
        dsline.Pipeline("edges")
        .source(str(film))
        .map(killer, name="killer")  # in this process, as it has no workers
        .map(Edges, workers=2, name="edges", queue=4)
        .broadcast(2)
    )
    pipeline = dsline.Pipeline.together(
        edges.batch(16, name="batch").sink(str(target), append="rows", name="file"),
        shown.sink(view, name="view"),
    )
    with pipeline.start() as run:
        killer.run = run
        report = run.supervise(progress=True)
    return report, killer.killed


def check(film, target, seen):
    """Compare with what one process computes."""
    edges = Edges()
    expected = [edges(frame) for frame in decode(film)]
    found = np.load(target, mmap_mode="r")
    if len(found) != len(expected):
        sys.exit(f"{len(found)} frames of {len(expected)} are in {target}")
    different = [number for number, frame in enumerate(expected) if not np.array_equal(frame, found[number])]
    if different:
        sys.exit(f"frames {different[:10]} differ or are not in their place")
    numbers = [number for number, _ in seen]
    if numbers != sorted(set(numbers)):
        sys.exit(f"the viewer saw frames out of order: {numbers}")
    if any(total != int(expected[number].sum(dtype=np.int64)) for number, total in seen):
        sys.exit("the viewer saw a frame that is none")
    return len(expected)


def main():
    parser = argparse.ArgumentParser(description="Find the edges of a film in two workers.")
    parser.add_argument("--frames", type=int, default=300, help="frames of the film (%(default)s)")
    parser.add_argument("--height", type=int, default=480, help="%(default)s")
    parser.add_argument("--width", type=int, default=640, help="%(default)s")
    parser.add_argument(
        "--pause", type=float, default=0.1, help="seconds that the viewer takes for a frame (%(default)s)"
    )
    parser.add_argument("--keep", type=Path, help="folder for film.mp4 and edges.npy, which stay")
    parser.add_argument("--no-kill", dest="kill", action="store_false", help="let all workers live")
    options = parser.parse_args()
    if (
        options.frames < 60
        or min(options.height, options.width) < 16
        or options.height % 2
        or options.width % 2
    ):
        parser.error("--frames must be at least 60, --height and --width even and at least 16")
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        film, target = folder / "film.mp4", folder / "edges.npy"
        try:
            make_film(film, options.frames, options.height, options.width)
        except ImportError as error:
            sys.exit(f"{error}; the film needs: pip install 'dsline[examples]'")

        context = multiprocessing.get_context("spawn")
        view = stack.enter_context(dsline.Broadcast(capacity=8, backpressure="drop_oldest"))
        seen, theirs = context.Pipe(duplex=False)
        viewer = context.Process(target=watch, args=(view, options.pause, theirs))
        viewer.start()
        theirs.close()
        try:
            seen.recv()  # it is there before the first frame
            began = time.monotonic()
            report, killed = run_pipeline(film, target, options, view)
            seconds = time.monotonic() - began
            view.shutdown()
            frames, lost = seen.recv()
        finally:
            viewer.join(10)
            viewer.kill()
            viewer.join()
        print(report.stats)
        count = check(film, target, frames)
    crashes = [event for event in report.events if event.kind == "crashed"]
    print(
        f"{count} frames in {seconds:.2f} s, start of the processes included; all equal to those of one process, in order"
    )
    print(f"workers killed: {len(crashes)}; the viewer saw {len(frames)} frames and missed {lost}")
    if len(crashes) != (killed is not None):
        sys.exit(f"process {killed} was killed, and {len(crashes)} crashes were noticed")


if __name__ == "__main__":
    main()
