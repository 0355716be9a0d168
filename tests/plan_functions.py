"""Functions for pipelines in tests: of a module, so that plans can name them and workers can import them."""


def double(value):
    return value * 2


def is_even(value):
    return value % 2 == 0


def is_odd(value):
    return value % 2 == 1


def numbers():
    return range(5)


def take(item):
    pass
