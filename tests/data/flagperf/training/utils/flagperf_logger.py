"""A stand-in for FlagPerf's logger of its own scripts."""


class FlagPerfLogger:
    def init(self, logpath, logfile, loglevel="info", mode="file", log_caller=False):
        pass

    def info(self, message):
        print(message, flush=True)

    error = info

    def stop(self):
        pass
