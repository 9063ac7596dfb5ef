"""Many processes and many devices: starting and watching processes, signals, the mesh and what lies where on it."""
