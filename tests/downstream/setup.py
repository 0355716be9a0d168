"""A package of someone else's that sends through a dsline channel without the GIL."""

from Cython.Build import cythonize
from setuptools import Extension, setup

import dsline

sender = Extension(
    "sender",
    ["sender.pyx"],
    language="c++",
    include_dirs=[dsline.get_include()],
    extra_compile_args=["-std=c++20"],
)

setup(name="sender", version="1.0", ext_modules=cythonize([sender], language_level=3))
