#include "channel/directory.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>

#include "memory/storage.hpp"
#include "support/channels.hpp"

namespace dsline::channel {
namespace {

using memory::StorageKind;
using support::code_of;
using support::Folder;
using support::Name;

TEST(ChannelName, LettersDigitsDotsDashesAndUnderscoresAreNames) {
  for (const char* name : {"a", "Z", "0", "a.b", "-", "_", "camera-1_raw.v2"})
    EXPECT_NO_THROW(check_name(name)) << name;
  EXPECT_NO_THROW(check_name(std::string(100, 'n')));
}

TEST(ChannelName, EverythingElseIsRefusedWithTheRule) {
  for (const std::string& name :
       {std::string(), std::string(".hidden"), std::string(".."), std::string("a/b"), std::string("a b"),
        std::string("\xC3\xA4"), std::string("a\n"), std::string(101, 'n')}) {
    std::string why;
    EXPECT_EQ(code_of([&] { check_name(name); }, &why), ErrorCode::InvalidArgument);
    EXPECT_NE(why.find("1 to 100"), std::string::npos) << why;
  }
  EXPECT_EQ(code_of([] { check_name(std::string("a\0b", 3)); }), ErrorCode::InvalidArgument);
}

TEST(ChannelDirectory, IsThisUsersAlone) {
  std::string directory = prepare_directory(0600);
  struct stat info {};
  ASSERT_EQ(stat(directory.c_str(), &info), 0);
  EXPECT_EQ(info.st_uid, geteuid());
  EXPECT_EQ(info.st_mode & 0066, 0u);
  EXPECT_EQ(directory, channel_directory());
}

TEST(ChannelDirectory, ListsTheNamesThatExist) {
  Name name;
  auto channel = Channel::open_named(name, support::small(), OpenMode::Create);
  auto has = [&name] {
    std::vector<std::string> names = list_channels();
    return std::find(names.begin(), names.end(), static_cast<const std::string&>(name)) != names.end();
  };
  EXPECT_TRUE(has());
  channel->unlink();
  EXPECT_FALSE(has());
}

TEST(OpenStorage, IsNothingWhereThereIsNoFile) {
  Folder folder;
  EXPECT_EQ(open_storage(folder / "none", StorageKind::File), nullptr);
}

TEST(OpenStorage, FollowsNoSymbolicLink) {
  Folder folder;
  ASSERT_EQ(symlink("/etc/passwd", (folder / "link").c_str()), 0);
  EXPECT_EQ(code_of([&] { open_storage(folder / "link", StorageKind::File); }), ErrorCode::ChannelPermission);
}

TEST(OpenStorage, RefusesWhatIsNoRegularFile) {
  Folder folder;
  ASSERT_EQ(mkdir((folder / "dir").c_str(), 0700), 0);
  ASSERT_EQ(mkfifo((folder / "fifo").c_str(), 0600), 0);
  EXPECT_EQ(code_of([&] { open_storage(folder / "dir", StorageKind::File); }), ErrorCode::ChannelLayout);
  EXPECT_EQ(code_of([&] { open_storage(folder / "fifo", StorageKind::File); }), ErrorCode::ChannelLayout);
}

TEST(UnnamedStorage, HasNoNameUntilItIsLinkedAndTheFirstLinkWins) {
  Folder folder;
  std::string path = folder / "file";
  auto first = make_unnamed_storage(path, StorageKind::File, 0640);
  auto second = make_unnamed_storage(path, StorageKind::File, 0600);
  EXPECT_NE(access(path.c_str(), F_OK), 0);
  EXPECT_TRUE(link_storage(*first, path));
  EXPECT_FALSE(link_storage(*second, path));
  EXPECT_TRUE(is_named(*first, path));
  EXPECT_FALSE(is_named(*second, path));
  struct stat info {};
  ASSERT_EQ(stat(path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0640u);
}

TEST(UnnamedStorage, TheModeIsNotCutByTheUmask) {
  Folder folder;
  std::string path = folder / "file";
  mode_t before = umask(0077);
  auto storage = make_unnamed_storage(path, StorageKind::File, 0666);
  umask(before);
  link_storage(*storage, path);
  struct stat info {};
  ASSERT_EQ(stat(path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0666u);
}

TEST(UnnamedStorage, AMissingDirectoryIsNamed) {
  Folder folder;
  std::string why;
  EXPECT_EQ(code_of([&] { make_unnamed_storage(folder / "no/file", StorageKind::File, 0600); }, &why),
            ErrorCode::ChannelNotFound);
  EXPECT_NE(why.find("/no"), std::string::npos) << why;
}

TEST(RemoveName, LeavesANameThatBelongsToAnotherFile) {
  Folder folder;
  std::string path = folder / "file";
  auto mine = make_unnamed_storage(path, StorageKind::File, 0600);
  auto other = make_unnamed_storage(path, StorageKind::File, 0600);
  ASSERT_TRUE(link_storage(*other, path));
  remove_name(*mine, path);
  EXPECT_TRUE(is_named(*other, path));
  remove_name(*other, path);
  EXPECT_NE(access(path.c_str(), F_OK), 0);
}

}  // namespace
}  // namespace dsline::channel
