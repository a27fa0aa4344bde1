"""One tree of options: its fields, its rules, its flags, and its errors."""
