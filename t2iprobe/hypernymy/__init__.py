"""What does a text-to-image model understand? ISP and SCS over WordNet (arXiv 2310.09247)."""

from t2iprobe.hypernymy.hierarchy import Hierarchy

__all__ = ["Hierarchy"]
