"""Language models larger than the memory they run in: they write, vary and judge the prompts."""
