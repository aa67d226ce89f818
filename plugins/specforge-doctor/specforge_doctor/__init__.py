"""`specforge doctor`: does what was trained get accepted where it is served?"""
