"""Print the table of bounds of docs/security.md.

python scripts/bounds_table.py
"""

from kvlink.wire.checked import table

if __name__ == "__main__":
    print(table())
