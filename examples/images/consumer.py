import dsline

with dsline.ShmChannel("frames") as channel:
    for _ in range(4):
        message = channel.recv_message()
        frame = message.array()
        print(message.meta["name"], frame.shape, frame.dtype, frame.mean(axis=(0, 1)).round(1))
