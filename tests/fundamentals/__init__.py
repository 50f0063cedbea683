"""Fleet Commander in one reading: each test shows one thing that it does, with the Python SDK, on a real fleet.

Read the files in the order of their numbers. Only the good case is here; what can go wrong is tested elsewhere.
"""
