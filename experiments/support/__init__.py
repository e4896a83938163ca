"""What several experiments share: tasks, pretraining, reports, tables, timing.

Import from its modules; nothing is imported from here.
"""
