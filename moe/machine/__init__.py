"""Where the model meets the machine: which device and number format, what it costs in operations and memory, files that
are whole or not there, and what the commands share."""
