"""Can this run be stopped anywhere?"""
