"""Attacks and accidents as somebody met them, told request for request to agents that run as processes of their own.

Each module is one of them: its docstring says what a user saw, its test what is right. They call past the
package's own clients, which would refuse to send most of it.
"""
