"""How fast and how large: timing, rivals, data sheets of GPUs, the planner."""
