"""t2iprobe: what does a text-to-image model understand, and can it learn what it does not?"""

__version__ = "0.1.0"
