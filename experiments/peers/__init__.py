"""Attentions trained from scratch on digits, with one budget.

Their accuracy, cost and plans, and which claims of their papers can be reproduced.
"""
