// Gets and puts of values between two ranks of Open MPI on one host: two-sided, by messages that
// are asked for and answered, and one-sided, by a window of the other rank. For
// scripts/bench-peers; no part of Kvant.
//
//   mpirun -np 2 mpi_bench SIZE OUTSTANDING SECONDS
//
// Prints one JSON object for get and one for put of each. The values are OUTSTANDING of them, again
// and again, as in `kvant bench transport`. One-sided operations are begun together, as many as
// OUTSTANDING says, and end with one flush: nothing else says that a put has arrived.
#include <mpi.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <vector>

namespace {

constexpr int kClient = 0;
constexpr int kServer = 1;
constexpr int kNotes = 1;       // tag of what is asked
constexpr int kFirstSlot = 10;  // tag of the first slot's value or answer

struct Note {
  enum Kind : int { kGet, kPut, kEnd } kind;
  int slot;
};

// The other end of two-sided operations, until it is told to end.
void Serve(std::vector<char>* values, int size) {
  const auto of_slot = [&](int slot) {
    return values->data() + static_cast<size_t>(slot) * static_cast<size_t>(size);
  };
  std::deque<MPI_Request> sent;
  while (true) {
    Note note = {};
    MPI_Recv(&note, sizeof(note), MPI_BYTE, kClient, kNotes, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    if (note.kind == Note::kGet) {
      sent.emplace_back();
      MPI_Isend(of_slot(note.slot), size, MPI_BYTE, kClient, kFirstSlot + note.slot, MPI_COMM_WORLD,
                &sent.back());
    } else if (note.kind == Note::kPut) {
      MPI_Recv(of_slot(note.slot), size, MPI_BYTE, kClient, kFirstSlot + note.slot, MPI_COMM_WORLD,
               MPI_STATUS_IGNORE);
      MPI_Send(nullptr, 0, MPI_BYTE, kClient, kFirstSlot + note.slot, MPI_COMM_WORLD);
    }
    while (!sent.empty()) {
      int done = 0;
      if (note.kind == Note::kEnd) {
        MPI_Wait(&sent.front(), MPI_STATUS_IGNORE);
        done = 1;
      } else {
        MPI_Test(&sent.front(), &done, MPI_STATUS_IGNORE);
      }
      if (done == 0) break;
      sent.pop_front();
    }
    if (note.kind == Note::kEnd) return;
  }
}

void Print(const char* peer, bool get, int size, int outstanding, double took,
           std::vector<double>* latencies) {
  std::sort(latencies->begin(), latencies->end());
  const auto count = static_cast<double>(latencies->size());
  std::printf(
      "{\"peer\": \"%s\", \"op\": \"%s\", \"size_bytes\": %d, \"outstanding\": %d, "
      "\"gb_per_s\": %.6f, \"us_p50\": %.2f}\n",
      peer, get ? "get" : "put", size, outstanding, count * size / took / 1e9,
      (*latencies)[latencies->size() / 2]);
}

void MeasureTwoSided(bool get, int size, int outstanding, double seconds) {
  struct Slot {
    std::vector<char> value;
    MPI_Request of_value = MPI_REQUEST_NULL;
    MPI_Request of_answer = MPI_REQUEST_NULL;
    double asked = 0;
  };
  std::vector<Slot> slots(static_cast<size_t>(outstanding));
  for (Slot& slot : slots) slot.value.assign(static_cast<size_t>(size), 'v');
  std::vector<double> latencies;
  const double begun = MPI_Wtime();
  size_t asked = 0;
  size_t ended = 0;
  while (true) {
    const bool over = MPI_Wtime() - begun >= seconds;
    if (over && ended == asked) break;
    while (!over && asked - ended < slots.size()) {
      const int number = static_cast<int>(asked % slots.size());
      Slot& slot = slots[static_cast<size_t>(number)];
      slot.asked = MPI_Wtime();
      const Note note = {get ? Note::kGet : Note::kPut, number};
      if (get) {
        MPI_Irecv(slot.value.data(), size, MPI_BYTE, kServer, kFirstSlot + number, MPI_COMM_WORLD,
                  &slot.of_value);
      } else {
        MPI_Irecv(nullptr, 0, MPI_BYTE, kServer, kFirstSlot + number, MPI_COMM_WORLD,
                  &slot.of_answer);
      }
      MPI_Send(&note, sizeof(note), MPI_BYTE, kServer, kNotes, MPI_COMM_WORLD);
      if (!get) {
        MPI_Isend(slot.value.data(), size, MPI_BYTE, kServer, kFirstSlot + number, MPI_COMM_WORLD,
                  &slot.of_value);
      }
      ++asked;
    }
    Slot& oldest = slots[ended % slots.size()];
    MPI_Wait(&oldest.of_value, MPI_STATUS_IGNORE);
    MPI_Wait(&oldest.of_answer, MPI_STATUS_IGNORE);
    latencies.push_back((MPI_Wtime() - oldest.asked) * 1e6);
    ++ended;
  }
  Print("open mpi", get, size, outstanding, MPI_Wtime() - begun, &latencies);
}

void MeasureOneSided(bool get, int size, int outstanding, double seconds, MPI_Win window) {
  std::vector<std::vector<char>> values(static_cast<size_t>(outstanding),
                                        std::vector<char>(static_cast<size_t>(size), 'v'));
  std::vector<double> latencies;
  const double begun = MPI_Wtime();
  int key = 0;
  while (MPI_Wtime() - begun < seconds) {
    const double asked = MPI_Wtime();
    for (std::vector<char>& value : values) {
      const MPI_Aint at = static_cast<MPI_Aint>(key++ % outstanding) * size;
      if (get) {
        MPI_Get(value.data(), size, MPI_BYTE, kServer, at, size, MPI_BYTE, window);
      } else {
        MPI_Put(value.data(), size, MPI_BYTE, kServer, at, size, MPI_BYTE, window);
      }
    }
    MPI_Win_flush(kServer, window);
    latencies.insert(latencies.end(), values.size(), (MPI_Wtime() - asked) * 1e6);
  }
  Print("open mpi one-sided", get, size, outstanding, MPI_Wtime() - begun, &latencies);
}

}  // namespace

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  int rank = 0;
  int ranks = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  const int size = argc == 4 ? std::atoi(argv[1]) : 0;
  const int outstanding = argc == 4 ? std::atoi(argv[2]) : 0;
  const double seconds = argc == 4 ? std::atof(argv[3]) : 0;
  if (ranks != 2 || size <= 0 || outstanding <= 0 || !(seconds > 0)) {
    if (rank == 0) std::fprintf(stderr, "usage: mpirun -np 2 mpi_bench SIZE OUTSTANDING SECONDS\n");
    MPI_Finalize();
    return 2;
  }
  std::vector<char> values;
  if (rank == kServer)
    values.assign(static_cast<size_t>(outstanding) * static_cast<size_t>(size), 'v');

  for (const bool get : {true, false}) {
    if (rank == kServer) {
      Serve(&values, size);
    } else {
      MeasureTwoSided(get, size, outstanding, seconds);
      const Note end = {Note::kEnd, 0};
      MPI_Send(&end, sizeof(end), MPI_BYTE, kServer, kNotes, MPI_COMM_WORLD);
    }
  }

  char* exposed = nullptr;
  MPI_Win window;
  MPI_Win_allocate(static_cast<MPI_Aint>(values.size()), 1, MPI_INFO_NULL, MPI_COMM_WORLD, &exposed,
                   &window);
  std::fill_n(exposed, values.size(), 'v');
  MPI_Barrier(MPI_COMM_WORLD);
  if (rank == kClient) {
    MPI_Win_lock(MPI_LOCK_SHARED, kServer, 0, window);
    for (const bool get : {true, false}) MeasureOneSided(get, size, outstanding, seconds, window);
    MPI_Win_unlock(kServer, window);
  }
  MPI_Barrier(MPI_COMM_WORLD);
  MPI_Win_free(&window);
  MPI_Finalize();
}
