"""The command line: a file for each command parses its arguments and calls what does the work. Only
the chosen one is imported, and it imports torch or Lightning no earlier than it must.
"""
