from hypothesis import settings

# The first example of a test pays for imports, and a busy machine for its neighbours: no time limit per example.
settings.register_profile("data", deadline=None)
settings.load_profile("data")
