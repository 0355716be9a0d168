from skimage import data

import dsline

with dsline.ShmChannel("frames") as channel:
    for name in ("astronaut", "coffee", "rocket", "retina"):
        channel.send(getattr(data, name)(), meta={"name": name})
